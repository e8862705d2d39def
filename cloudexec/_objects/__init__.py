"""Large objects: blobs, where they are kept, and handles to them."""
