"""Templates come from strangers: they get text in and text out, a bounded time, and nothing else."""

import datetime
import time

import pytest

from itjax.text import sandbox

REFUSALS = "refused: |no loader|'lipsum' is undefined|'undefined_function' is undefined"
TODAY = datetime.date(2025, 12, 17)


def render(source, **variables):
    return sandbox.render(source, variables, today=TODAY)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ range.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '%s' % 1 }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum() }}",
        "{{ undefined_function() }}",
    ],
)
def test_what_leads_out_is_refused(source):
    with pytest.raises(ValueError, match=REFUSALS):
        render(source, messages=[{"role": "user"}])


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x'.replace('', 'y' * 4000000).replace('', 'z' * 4000000) }}",
        "{{ ('ab' * 1000000) | replace('', 'ab' * 1000000) }}",
        "{{ 'x'.center(10**9) }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ 'a\nb' | indent(10**9) }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ (['x' * 1000000] * 100000) | join }}",
        "x" * (sandbox.MAX_SOURCE + 1),
    ],
)
def test_what_does_not_end_is_refused_in_time(source):
    start = time.monotonic()
    with pytest.raises(ValueError, match="refused: it"):
        render(source)
    assert time.monotonic() - start < sandbox.MAX_SECONDS + 1


def test_templates_find_what_they_expect():
    assert render("{{ strftime_now('%d %b %Y') }}") == "17 Dec 2025"
    assert render("{{ x | tojson }}", x={"b": "<\u00e9>", "a": [1, None]}) == '{"b": "<\u00e9>", "a": [1, null]}'
    assert render("{{ x | tojson(indent=2) }}", x=[1]) == "[\n  1\n]"
    assert render("{% for i in x %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", x=[1, 2, 3]) == "1"
    assert render("  {% if true %}\n  x\n  {% endif %}\n") == "  x\n"
    assert render("{{ x[::-1][0] }}{{ loop is defined }}{{ x | length }}", x=[1, 2]) == "2False2"
    assert render("{% for i in x %}{{ loop.last }}{{ loop.length }}{% endfor %}", x=[1]) == "True1"


def test_the_marks_of_generation_change_nothing_of_the_text():
    source = "a{% generation %}b{% endgeneration %}c{% for x in [1, 2] %}{%- generation %}{{ x }}{% endgeneration %}{% endfor %}"
    text, spans = sandbox.render_marked(source, {}, today=TODAY)
    assert text == render(source) == "abc12"
    assert [text[span] for span in spans] == ["b", "1", "2"]


def test_a_template_may_refuse():
    with pytest.raises(ValueError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
