"""Shards behind URLs: fetched whole, checked, kept in a bounded cache, and prefetched in the order of the steps."""
