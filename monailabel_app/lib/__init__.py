"""The ZeroSeg app's parts; `lib` is the name MONAI Label reloads with an app."""
