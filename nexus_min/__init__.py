"""Nexus-Gen (arXiv 2504.21356), by hand: one model that understands, generates and edits images."""
