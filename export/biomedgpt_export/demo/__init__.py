"""How the demo model is trained: BioMedGPT-10B's architecture at a few million parameters, on public data."""
