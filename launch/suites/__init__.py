"""Suites: encoders x data sets x protocols, answered on this machine or as jobs."""
