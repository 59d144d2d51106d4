"""The annotation workflow of UMG-CLIP (papers/003, section 3): images in, tags, captions, boxes, masks out."""
