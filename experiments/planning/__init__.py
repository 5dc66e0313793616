"""Compiling for devices that are not there."""
