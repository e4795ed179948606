"""Masks of images for people: any words, points or boxes; of files, folders, animations and videos."""
