"""Every number of the documents by one command: `python -m experiments.claims`, `scaling`, `compare`, `smollm2`. This
folder imports from all others; nothing outside of it imports it."""
