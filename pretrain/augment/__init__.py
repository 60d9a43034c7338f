"""Color, erasing and mixing applied to whole batches on the device, from parameters that the host drew."""
