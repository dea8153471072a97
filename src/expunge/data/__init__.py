"""Where examples come from, and how they are split into what to forget and what to keep."""
