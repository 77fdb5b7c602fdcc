"""Audits: whether a ledger says what was spent, and whether a mechanism keeps its promise.

    findings.py      what an audit reports: checks that passed or failed, lower bounds on epsilon
    curves.py        trade-off curves: what a claim allows an attacker
    bounds.py        lower bounds on epsilon, and tests of a claim, from guesses about canaries
    parallel.py      one of them by binomial intervals, as if canaries were independent runs
    search.py        limits and p-values that have to be searched for
    conformance.py   whether residual noise and samples are what the mechanism says, asked of
    values.py            the noise's size, mean and shape
    dependence.py        noise that is used again or shared
    samples.py           Poisson samples
    laws.py          the p-values: exact laws and proved bounds
    ledger.py        a second, independent reading of a ledger: totals and rules from its rows alone
    recount.py       its arithmetic: costs and budgets in whole numbers
    terms.py         its reading of declared budgets
    statement.py     signed privacy statements

Statistics only: no torch, no Flower, no file. What runs the training path is in fedhead.client.auditing, what reads
files and writes reports in fedhead.simulations.audit.
"""
