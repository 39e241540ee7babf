"""Serve a model over HTTP, as OpenAI's API does: python -m harness.serve PATH.

Reading order:

    app         the application and its endpoints; what requests may ask for
    __main__    the command line, and the server
"""
