"""The web page: `python -m nexus_min app`."""
