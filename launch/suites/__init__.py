"""Suites evaluate encoders x data sets x protocols, on this machine or as jobs."""
