"""Page codecs: how closed pages are stored."""
