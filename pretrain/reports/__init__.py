"""Pages about a run and about many results, with their figures. Self-contained HTML, Markdown and CSV."""
