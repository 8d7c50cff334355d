//! `explain` and `can`: may somebody do something, by which rule, and what would have to be true.

use clap::{
    Args,
    builder::{PossibleValue, StringValueParser, TypedValueParser},
};
use serde_json::{Value, json};
use xman_client::{Address, Caller, Explanation as Trouble, fleet};
use xman_common::{
    name::Principal,
    protocol::{self, About, ExplainOther, ExplainStep, Explanation, Reply, Request, Verb},
};

use crate::{
    exit::{FAILED, Tally},
    heard::{conclude, error_row},
    options::Format,
    output::{Row, Style, error_value, key_value},
    setting::{Setting, Stop, misfit},
    target::{self, Purpose},
};

/// What `rxm help explain` says after the options.
pub(crate) const EXPLAIN_HELP: &str = "\
Tells the decision, the rule behind it, what each of the host's backends says, and what would have to be true. Without a domain it is about the host, or about a domain \
    that nobody owns. \
    'own' asks whether one owns what one creates; 'act-for' takes a principal in the domain's place. \
    With one host, a name is asked about as typed: so you learn why you may not, even if you may not see whether it is there. \
    The question that was answered ends with 0, whatever the answer.

Examples:
  rxm explain pause skirit80/web
  rxm explain bob@EXAMPLE.ORG destroy skirit80/web        as far as you may ask about others
  rxm -H @grid explain create
  rxm -H skirit80 explain act-for carol@EXAMPLE.ORG

JSON: host, principal, action, domain (null for the host), allowed, backend (that decided, or null), rule, \
    steps (backend, opinion: allow, deny, none or not-asked, because, wants).";

/// What `rxm help can` says after the options.
pub(crate) const CAN_HELP: &str = "\
Prints yes or no (nothing with --quiet) and ends with 0 or 1. Of several hosts all must allow it. \
    Where a host does not answer and no other says no, it ends as always: 3, 4 or 5.

Examples:
  rxm can pause skirit80/web
  rxm -H skirit80 can -q create && rxm -H skirit80 create web.xml
  rxm can bob@EXAMPLE.ORG start skirit80/web

JSON is that of explain.";

/// Arguments of `explain` and `can`.
#[derive(Debug, Args)]
pub(crate) struct QuestionArgs {
    /// The words of the question.
    #[arg(
        value_name = "QUESTION",
        required = true,
        num_args = 1..=3,
        value_parser = WordParser,
        help = "[PRINCIPAL] ACTION [DOMAIN]: whose right (a full principal; your own without), to do what, to which domain (NAME, UUID or HOST/NAME)"
    )]
    pub(crate) words: Vec<String>,
}

/// Takes any word, and offers the actions to shells.
#[derive(Clone)]
struct WordParser;

impl TypedValueParser for WordParser {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<String, clap::Error> {
        StringValueParser::new().parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(actions().map(PossibleValue::new)))
    }
}

/// Returns all that policies decide about: the verbs, and what is no call.
pub(crate) fn actions() -> impl Iterator<Item = &'static str> {
    let verbs = Verb::ALL.iter().map(|verb| verb.name());
    verbs.chain([OWN, ACT_FOR])
}

/// To own what one creates.
pub(crate) const OWN: &str = "own";

/// To act for somebody else, who is named in the domain's place.
pub(crate) const ACT_FOR: &str = "act-for";

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
struct Question {
    /// Whose right, where not one's own.
    principal: Option<Principal>,
    action: String,
    /// To what, as typed.
    on: Option<String>,
}

impl Question {
    /// Reads `[PRINCIPAL] ACTION [DOMAIN]`.
    fn read(words: &[String]) -> Result<Self, String> {
        let (principal, rest) = match words.split_first() {
            Some((first, rest)) if has_realm(first) => {
                let principal = first
                    .parse()
                    .map_err(|error| format!("'{first}' is no principal: {error}"))?;
                (Some(principal), rest)
            }
            Some(_) | None => (None, words),
        };
        let (action, rest) = rest.split_first().ok_or_else(|| {
            format!(
                "to do what? Actions are {}",
                actions().collect::<Vec<_>>().join(", ")
            )
        })?;
        if !actions().any(|known| known == action) {
            let actions: Vec<_> = actions().collect();
            return Err(format!(
                "'{action}' is no action; actions are {}. A principal has its realm: {action}@REALM",
                actions.join(", ")
            ));
        }
        match rest {
            [] => Ok(None),
            [on] => Ok(Some(on.clone())),
            [_, more, ..] => Err(format!(
                "one question is about one domain; '{more}' is too many"
            )),
        }
        .map(|on| Self {
            principal,
            action: action.clone(),
            on,
        })
    }

    fn request(&self, about: About) -> Request {
        let action = self.action.clone();
        match &self.principal {
            None => Request::Explain(protocol::Explain { action, about }),
            Some(principal) => Request::ExplainOther(ExplainOther {
                principal: principal.clone(),
                action,
                about,
            }),
        }
    }
}

/// Returns whether a word holds an `@` that no backslash takes its meaning.
fn has_realm(word: &str) -> bool {
    let mut is_escaped = false;
    word.chars().any(|c| {
        let is_realm = c == '@' && !is_escaped;
        is_escaped = c == '\\' && !is_escaped;
        is_realm
    })
}

/// What one host says, or why it says nothing.
type Heard = (Address, Result<Explanation, Trouble>);

/// `rxm explain`
pub(crate) async fn explain(setting: &Setting, args: QuestionArgs) -> Result<Tally, Stop> {
    let heard = ask(setting, &args).await?;
    match setting.output.format {
        Format::Json | Format::Yaml => setting.output.values(values(&heard))?,
        Format::Name => {
            for (address, _) in heard.iter().filter(|(_, said)| is_allowed(said)) {
                setting.output.line(&address.to_string())?;
            }
        }
        Format::Table | Format::Wide => match heard.as_slice() {
            [(host, Ok(said))] => setting.output.table_without_headers(lines(host, said))?,
            [(_, Err(_))] => {}
            _ => setting
                .output
                .table(&HEADERS, heard.iter().map(row).collect())?,
        },
    }
    Ok(conclude(setting, &heard))
}

/// `rxm can`
pub(crate) async fn can(setting: &Setting, args: QuestionArgs) -> Result<Tally, Stop> {
    let heard = ask(setting, &args).await?;
    let is_refused = heard
        .iter()
        .any(|(_, said)| said.as_ref().is_ok_and(|said| !said.allowed));
    let is_known = is_refused || heard.iter().all(|(_, said)| is_allowed(said));
    if setting.output.is_structured() {
        setting.output.values(values(&heard))?;
    } else if is_known {
        setting
            .output
            .success(if is_refused { "no" } else { "yes" })?;
    }
    let tally = conclude(setting, &heard);
    if is_refused {
        Err(Stop::Code(FAILED))
    } else {
        Ok(tally)
    }
}

/// Asks every host that is meant: about a domain the one that has it.
async fn ask(setting: &Setting, args: &QuestionArgs) -> Result<Vec<Heard>, Stop> {
    let question = &Question::read(&args.words).map_err(Stop::Usage)?;
    let on = match &question.on {
        Some(domain) if question.action != ACT_FOR => {
            let (target, mut caller, found) =
                target::find_one(setting, domain, Purpose::Explain).await?;
            let (_, typed) = target::split(domain);
            let name = match &target.row {
                Some(row) => row.name.to_string(),
                None => typed.to_owned(),
            };
            let said = answer(setting, &mut caller, question, About::Domain(target.domain)).await;
            let said = said.map(|said| Explanation {
                domain: name,
                ..said
            });
            let silent = found.silent.into_iter();
            return Ok([(target.address, said)]
                .into_iter()
                .chain(silent.map(|(host, error)| (host, Err(error))))
                .collect());
        }
        Some(other) => About::Person(whom(other).map_err(Stop::Usage)?),
        None if question.action == ACT_FOR => {
            return Err(Stop::Usage(
                "to act for whom? Say act-for PRINCIPAL".to_owned(),
            ));
        }
        None => About::Host,
    };
    let hosts = setting.hosts()?;
    setting.check_ticket().await?;
    let on = &on;
    Ok(fleet::all(hosts, fleet::WIDTH, |address| async move {
        let mut caller = setting.caller(&address);
        let said = answer(setting, &mut caller, question, on.clone()).await;
        (address, said)
    })
    .await)
}

fn whom(other: &str) -> Result<Principal, String> {
    other
        .parse()
        .map_err(|error| format!("'{other}' is no principal to act for: {error}"))
}

async fn answer(
    setting: &Setting,
    caller: &mut Caller,
    question: &Question,
    about: About,
) -> Result<Explanation, Trouble> {
    match setting.ask(caller, &question.request(about)).await? {
        (Reply::Explained(said), _) => Ok(said),
        _ => Err(misfit()),
    }
}

fn is_allowed(said: &Result<Explanation, Trouble>) -> bool {
    said.as_ref().is_ok_and(|said| said.allowed)
}

/// Returns the backend that has decided, if one had an opinion.
fn decider(said: &Explanation) -> Option<&str> {
    let decides = |step: &&ExplainStep| matches!(step.opinion.as_str(), "allow" | "deny");
    let step = said.steps.iter().find(decides)?;
    Some(&step.backend)
}

fn values(heard: &[Heard]) -> Vec<Value> {
    let value = |(address, said): &Heard| match said {
        Ok(said) => value(address, said),
        Err(error) => error_value(address, error),
    };
    heard.iter().map(value).collect()
}

fn value(address: &Address, said: &Explanation) -> Value {
    let steps: Vec<_> = said
        .steps
        .iter()
        .map(|step| {
            json!({
                "backend": step.backend,
                "opinion": step.opinion,
                "because": step.because,
                "wants": step.wants,
            })
        })
        .collect();
    json!({
        "host": address,
        "principal": said.principal,
        "action": said.action,
        "domain": Some(&said.domain).filter(|domain| !domain.is_empty()),
        "allowed": said.allowed,
        "backend": decider(said),
        "rule": said.rule,
        "steps": steps,
    })
}

const HEADERS: [&str; 5] = ["HOST", "PRINCIPAL", "MAY", "DECIDED BY", "RULE"];

fn row((address, said): &Heard) -> Row {
    let said = match said {
        Ok(said) => said,
        Err(error) => return error_row(address, error, HEADERS.len(), 1),
    };
    let mut row = Row::plain(vec![
        address.to_string().into(),
        said.principal.to_string().into(),
        if said.allowed { "yes" } else { "no" }.into(),
        decider(said).unwrap_or("-").into(),
        said.rule.clone().into(),
    ]);
    if let Some(may) = row.cells.get_mut(2) {
        may.style = style(said.allowed);
    }
    row
}

fn style(allowed: bool) -> Style {
    if allowed { Style::Good } else { Style::Bad }
}

/// The answer of one host: the decision, the rule, and then the backends in the order in which they are asked.
fn lines(host: &Address, said: &Explanation) -> Vec<Row> {
    let (may, by) = if said.allowed {
        ("may", "Rule:")
    } else {
        ("may not", "Because:")
    };
    let on = match said.domain.as_str() {
        "" => String::new(),
        domain => format!(" {domain}"),
    };
    let decision = format!("{} {may} {}{on} on {host}", said.principal, said.action);
    let mut lines = vec![
        Row {
            style: style(said.allowed),
            ..key_value("Decision:", decision)
        },
        key_value(by, said.rule.clone()),
        key_value(
            "Decided by:",
            decider(said).unwrap_or("no backend").to_owned(),
        ),
    ];
    for step in &said.steps {
        let opinion = match step.opinion.as_str() {
            "none" => "no opinion",
            "not-asked" => "not asked, since it is decided",
            opinion => opinion,
        };
        let because = match step.because.as_str() {
            "" => String::new(),
            because => format!(": {because}"),
        };
        lines.push(key_value(
            &format!("{}:", step.backend),
            format!("{opinion}{because}"),
        ));
        for (at, want) in step.wants.iter().enumerate() {
            let key = if at == 0 {
                "  would allow if:"
            } else {
                "  or if:"
            };
            lines.push(key_value(key, want.clone()));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Question, String> {
        let words: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
        Question::read(&words)
    }

    #[track_caller]
    fn check(text: &str, principal: Option<&str>, action: &str, on: Option<&str>) {
        let expected = Question {
            principal: principal.map(|p| p.parse().unwrap()),
            action: action.to_owned(),
            on: on.map(str::to_owned),
        };
        assert_eq!(read(text), Ok(expected), "{text}");
    }

    #[test]
    fn a_first_word_with_a_realm_is_somebody_elses_name() {
        check("pause", None, "pause", None);
        check("pause a/web", None, "pause", Some("a/web"));
        check("bob@R pause", Some("bob@R"), "pause", None);
        check(
            "http/b.org@R own web",
            Some("http/b.org@R"),
            "own",
            Some("web"),
        );
        check("act-for carol@R", None, "act-for", Some("carol@R"));
        check(r"b\@b@R pause", Some(r"b\@b@R"), "pause", None);
    }

    #[test]
    fn what_is_no_question_says_what_is_missing() {
        for (text, reason) in [
            ("", "to do what"),
            ("bob@R", "to do what"),
            ("bob pause", "bob@REALM"),
            (r"bob\@R pause", "no action"),
            ("fly web", "actions are whoami, list"),
            ("@R pause", "empty principal"),
            ("bob@ pause", "no realm"),
            ("pause web db", "'db' is too many"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn whom_one_acts_for_stands_where_the_domain_does() {
        assert_eq!(whom("carol@R"), Ok("carol@R".parse().unwrap()));
        assert!(whom("carol").unwrap_err().contains("realm"));
        assert_eq!(whom("a/b@R"), Ok("a/b@R".parse().unwrap()));
    }

    fn said(allowed: bool) -> Explanation {
        let step = |backend: &str, opinion: &str, because: &str, wants: &[&str]| ExplainStep {
            backend: backend.to_owned(),
            opinion: opinion.to_owned(),
            because: because.to_owned(),
            wants: wants.iter().map(|want| (*want).to_owned()).collect(),
        };
        Explanation {
            principal: "bob@R".parse().unwrap(),
            action: "pause".to_owned(),
            domain: "web".to_owned(),
            allowed,
            rule: "cedar:site.cedar:owners".to_owned(),
            steps: vec![
                step(
                    "k5login",
                    "none",
                    "bob@R is not in it",
                    &["bob@R stands in it", "x"],
                ),
                step("cedar", if allowed { "allow" } else { "none" }, "", &[]),
                step("external", "not-asked", "", &[]),
            ],
        }
    }

    #[test]
    fn the_fields_of_an_explanation_in_json_are_stable() {
        let host = "a".parse().unwrap();
        assert_eq!(
            value(&host, &said(true)).to_string(),
            concat!(
                r#"{"host":"a","principal":"bob@R","action":"pause","domain":"web","allowed":true,"backend":"cedar","#,
                r#""rule":"cedar:site.cedar:owners","steps":["#,
                r#"{"backend":"k5login","opinion":"none","because":"bob@R is not in it","wants":["bob@R stands in it","x"]},"#,
                r#"{"backend":"cedar","opinion":"allow","because":"","wants":[]},"#,
                r#"{"backend":"external","opinion":"not-asked","because":"","wants":[]}]}"#
            )
        );
        let of_host = Explanation {
            domain: String::new(),
            ..said(false)
        };
        let value = value(&host, &of_host);
        assert!(
            value["domain"].is_null() && value["backend"].is_null(),
            "{value}"
        );
    }

    #[test]
    fn people_read_the_decision_the_rule_and_every_backend() {
        let text: Vec<Vec<_>> = lines(&"a".parse().unwrap(), &said(true))
            .into_iter()
            .map(|row| row.cells.into_iter().map(|cell| cell.text).collect())
            .collect();
        assert_eq!(
            text,
            [
                ["Decision:", "bob@R may pause web on a"],
                ["Rule:", "cedar:site.cedar:owners"],
                ["Decided by:", "cedar"],
                ["k5login:", "no opinion: bob@R is not in it"],
                ["  would allow if:", "bob@R stands in it"],
                ["  or if:", "x"],
                ["cedar:", "allow"],
                ["external:", "not asked, since it is decided"],
            ]
        );
    }
}
