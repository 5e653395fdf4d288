"""``biomedgpt-edge``: one file per command."""
