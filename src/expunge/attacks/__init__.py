"""Attacks that try to get back what was forgotten. Each is a measure that runs where an audit asks for it by name."""
