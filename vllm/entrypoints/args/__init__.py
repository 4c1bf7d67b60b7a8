"""The flags of the server and of the commands: those that do something, and those that other servers know."""
