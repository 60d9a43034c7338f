"""Images from elsewhere into shards of ours: folders, archives, tables, and shards that others wrote."""
