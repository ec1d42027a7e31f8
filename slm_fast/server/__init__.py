"""A store served over HTTP (`slm-fast serve`): the extra `serve`. FastAPI is known in app.py and below only."""
