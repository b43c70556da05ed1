"""The server's state: a database (SQLite, or PostgreSQL by URL), and the files beside it."""
