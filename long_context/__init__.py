"""Longer contexts: position schemes, memories beyond the window, extrapolation measured."""
