"""Packed layers."""
