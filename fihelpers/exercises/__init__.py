"""The checks of the book's exercises, a module a chapter: each reads an answer and says what is wrong.

A chapter imports its own module and calls a check with the answer and with what was given in the cell::

    from fihelpers.exercises import ch02 as check

    s_A = ...
    check.free_gradient(s_A, P, s_B, s_C)

To add an exercise, decorate a function of the chapter's module with
:func:`fihelpers.exercises.verdicts.exercise`. In the notebook put a markdown cell that asks, a code cell
tagged ``exercise`` that ends with the call, and a markdown cell that folds the solution into ``<details>``,
with its code in one block. The tests of the exercises find them there.
"""
