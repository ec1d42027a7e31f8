"""The HTTP server for a store (`slm-fast serve`, extra `serve`). Only app.py and its route modules use FastAPI."""
