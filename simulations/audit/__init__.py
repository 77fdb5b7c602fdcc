"""Audits from the command line and from Python: files in, a verdict, tables and a page out.

ledgers.py      `fedhead audit ledger`; its parts are ledger_*.py and show_ledgers.py
mechanism.py    `fedhead audit mechanism`; verdict.py shows it in a terminal
membership.py   `fedhead audit membership`; likelihood.py is its arithmetic, units.py chooses who is in
whole.py        `fedhead audit report`: a run's ledgers and its mechanism
page.py         the page for a data protection officer; with spending.py, pictures.py and page.html
"""
