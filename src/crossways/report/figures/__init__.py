"""The plots of the report, one file each; every function takes records and returns a Plotly figure."""
