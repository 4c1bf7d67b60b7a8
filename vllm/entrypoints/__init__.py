"""What users start: the command line, the HTTP server and the Python class."""
