"""Files elsewhere: named by URL, read in ranges, kept in a bounded cache. Nothing above this room knows how."""
