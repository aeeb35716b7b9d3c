//! Jinja's own renderings (3.1.6, set up as transformers 5.23 does), and bombs.

use super::*;

fn limits() -> Limits {
    Limits { steps: 300_000, held: 32 << 20, output: 256 << 10 }
}

fn now() -> NaiveDateTime {
    chrono::NaiveDate::from_ymd_opt(2026, 11, 25).unwrap().and_hms_opt(12, 0, 0).unwrap()
}

fn render(source: &str, given: &[(&'static str, Given)]) -> Outcome<String> {
    let rendered = Template::parse(source.to_owned())?.render(given, limits(), now())?;
    Ok(rendered.chars.iter().map(|code| plain(*code)).collect())
}

fn chat(messages: &serde_json::Value) -> Vec<(&'static str, Given)> {
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let message = |message: &serde_json::Value| {
        Given::Dict(vec![
            ("role", Given::Own(text(&message["role"]))),
            ("content", Given::Foreign(text(&message["content"]))),
        ])
    };
    vec![
        ("messages", Given::List(messages.as_array().unwrap().iter().map(message).collect())),
        ("tools", Given::None),
        ("documents", Given::None),
        ("add_generation_prompt", Given::Bool(true)),
        ("bos_token", Given::Own("<s>".into())),
        ("eos_token", Given::Own("</s>".into())),
    ]
}

#[test]
fn templates_render_as_jinja_renders_them() {
    let file = std::env::var("TENORA_JINJA_CASES").unwrap_or_else(|_| "src/text/jinja/cases.json".into());
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let given = chat(&golden["messages"]);
    let mut wrong = Vec::new();
    for case in golden["cases"].as_array().unwrap() {
        let source = case["template"].as_str().unwrap();
        let same = match (render(source, &given), case["text"].as_str(), case["error"].as_str()) {
            (Ok(text), Some(expected), _) if text == expected => continue,
            (Err(Failure::Error(text) | Failure::Said(text) | Failure::Syntax(text)), _, Some(expected))
                if text.contains(expected) =>
            {
                continue;
            }
            (other, ..) => other,
        };
        wrong.push(format!("{source}\n  is {same:?}\n not {}{}", case["text"], case["error"]));
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn bombs_are_stopped_before_they_take_time_or_memory() {
    let doubled =
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}";
    let lists = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}";
    let shared = "{% set ns = namespace(x=[1]) %}{% for i in range(100) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    let loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
    for bomb in [
        loops,
        "{% for i in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxx' }}{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 'x' * 10 ** 18 }}",
        "{{ 10 ** 18 * 'ab' }}",
        "{{ ([0] * 10 ** 9) | length }}",
        "{{ [[0] * 1000] * 10 ** 9 }}",
        doubled,
        lists,
        &format!("{shared}{{{{ ns.x }}}}"),
        &format!("{shared}{{{{ ns.x | tojson }}}}"),
        &format!("{shared}{{{{ ns.x == [ns.x[0], ns.x[1]] }}}}"),
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}",
        "{% set ns = namespace(x=1) %}{% set ns.x = ns %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:.1000000000f}'.format(1.5) }}",
        "{{ 'x'.center(10 ** 12) }}",
        "{{ 'x'.zfill(10 ** 12) }}",
        "{{ 'x' | center(10 ** 12) }}",
        "{{ ('x' * 100000).replace('', 'y' * 100000) }}",
        "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
        "{{ ('x' * 10000).join(range(10000) | map('string')) }}",
        "{{ range(10 ** 18) }}",
        "{{ 2 ** 63 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ range(100000) | map('string') | map('center', 100000) | list }}",
        "{{ [1] | batch(10 ** 9, 0) | list }}",
        "{{ {'a': range(9000) | list} | tojson(indent=10 ** 9) }}",
        "{{ 'x\ny' | indent(10 ** 12) }}",
        "{{ (range(100000) | list | sort) ~ (range(100000) | list) ~ (range(100000) | list) ~ (range(100000) | list) }}",
        "{{ (range(100000) | list) | unique | list | length }}",
        "{{ dict(range(100000) | map('string') | map('list')) }}",
    ] {
        let failure = render(bomb, &[]);
        assert!(failure.is_err(), "{bomb}: {:?}", failure.map(|text| text.len()));
    }
    let nested = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
    assert!(matches!(render(&nested, &[]), Err(Failure::Syntax(_))));
    let nested = "{% if 1 %}".repeat(100_000);
    assert!(matches!(render(&nested, &[]), Err(Failure::Syntax(_))));
    let long = format!("{{{{ {}1 }}}}", "1 + ".repeat(10_000));
    assert_eq!(render(&long, &[]), Ok("10001".into()), "long is not deep");
}

#[test]
fn a_limit_is_told_as_what_it_is() {
    let of = |source: &str| render(source, &[]).unwrap_err();
    assert_eq!(
        of("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        Failure::TooManySteps(300_000)
    );
    assert_eq!(of("{{ 'x' * 10 ** 9 }}"), Failure::TooMuchMemory(32 << 20));
    assert_eq!(of("{% for i in range(9999) %}{{ 'x' * 100 }}{% endfor %}"), Failure::TooMuchOutput(256 << 10));
}

/// Characters that are a message's stay known as such, and others do not become so.
#[test]
fn what_comes_from_a_message_is_known_whatever_is_done_with_it() {
    let given = [("m", Given::Foreign("a<B>'c\" d".into()))];
    for (source, expected) in [
        ("x{{ m }}y", "-aaaaaaaaa-"),
        ("{{ m | upper }}{{ m.lower() }}", "aaaaaaaaaaaaaaaaaa"),
        ("{{ m[1:4] ~ '|' ~ m[::-1] }}", "aaa-aaaaaaaaa"),
        ("{{ m.replace('<', '[') }}", "a-aaaaaaa"),
        ("{{ m.split('<') | join('<') }}", "a-aaaaaaa"),
        ("{{ m | tojson }}", "-aaaaaaaaaa-"),
        ("{{ [m] }}", "--aaaaaaaaaa--"),
        ("{{ '%s|%s' % (m[0], 'z') }}", "a--"),
        ("{{ '{}|{}'.format(m[0], 'z') }}", "a--"),
        ("{{ m | e }}", "aaaaaaaaaaaaaaaaaaaaaaa"),
        ("{% set x %}{{ m[0] }}z{% endset %}{{ x }}", "a-"),
        ("{% macro f(x) %}{{ x }}!{% endmacro %}{{ f(m[0]) }}", "a-"),
        ("{{ (m * 2)[:3] }}{{ m.center(11, '*') }}", "aaa-aaaaaaaaa-"),
        ("{% for ch in m[:2] %}{{ ch }}.{% endfor %}", "a-a-"),
    ] {
        let rendered = Template::parse(source.into()).unwrap().render(&given, limits(), now()).unwrap();
        let shown: String = rendered.chars.iter().map(|code| if code & FOREIGN != 0 { 'a' } else { '-' }).collect();
        assert_eq!(shown, expected, "{source}");
    }
}

proptest::proptest! {
    /// Nothing that is no template panics, and nothing takes more than it may.
    #[test]
    fn any_text_parses_or_is_refused(parts in proptest::collection::vec(proptest::sample::select(PARTS.to_vec()), 0..24)) {
        let source = parts.concat();
        let given = [("m", Given::Foreign("é <x>".into())), ("l", Given::List(vec![Given::Own("a".into()), Given::None]))];
        if let Ok(template) = Template::parse(source) {
            let _ = template.render(&given, Limits { steps: 20_000, held: 1 << 20, output: 1 << 12 }, now());
        }
    }
}

const PARTS: [&str; 64] = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "-",
    " ",
    "\n",
    "x",
    "m",
    "l",
    "'a'",
    "\"b\"",
    "1",
    "2.5",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ":",
    ",",
    ".",
    "|",
    "~",
    "+",
    "*",
    "**",
    "/",
    "//",
    "%",
    "==",
    "<",
    " in ",
    " not ",
    " is ",
    " and ",
    " or ",
    " if ",
    " else ",
    "for ",
    "endfor",
    "endif",
    "set ",
    "=",
    "macro f(x)",
    "endmacro",
    "f(1)",
    "loop.index",
    "range(9)",
    "upper",
    "tojson",
    "split('a')",
    "join",
    "map('upper')",
    "[1:]",
    "[::-1]",
    "raw",
    "endraw",
    "none",
    "namespace(a=1)",
    "defined",
];
