"""Cohorts: thousands of cases on several processes or a cluster, taken up again where a run ended, and run again."""
