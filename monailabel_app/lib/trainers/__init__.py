"""Training on the labels that people submitted: ``Update Model`` of OHIF, ``Train`` of 3D Slicer."""
