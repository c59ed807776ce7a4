"""Nexus-Gen (arXiv 2504.21356), whole and by hand: one model that understands, generates and edits images."""
