"""Compare quantizers on one model: measure each, and write one page."""
