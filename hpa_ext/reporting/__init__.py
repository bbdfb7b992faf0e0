"""Tables for a terminal and pictures for people."""
