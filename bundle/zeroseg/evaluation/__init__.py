"""Measuring segmentations against masks: protocols, a simulated annotator, metrics, baselines, confidence, tables."""
