"""What a user asks for, and the inferer that answers: clicks, boxes, scribbles, words, in images and volumes."""
