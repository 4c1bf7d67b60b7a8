"""HTTP server with the OpenAI API's requests and responses."""
