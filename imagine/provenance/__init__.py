"""What a saved picture says of its origin: settings, content credentials and a watermark.

`saving` writes them, `detection` reads them; both are used by the command line and meant for a server.
"""
