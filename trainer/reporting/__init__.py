"""The page about a run: its logs as curves, its charts, and its template."""
