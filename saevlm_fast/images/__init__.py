"""Images to harvest: folders, lists, tars, tables, drawn scenes; decoding them."""
