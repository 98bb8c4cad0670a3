"""Where arrays live, and how workers keep step."""
