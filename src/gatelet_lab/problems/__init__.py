"""The problems of `gatelet diagnose`, one per file. Each prints its results and returns them as Markdown."""
