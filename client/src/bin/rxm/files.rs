//! `create` and `define`: libvirt XML from a file or standard input.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use clap::Args;
use xman_client::{Address, Kind};
use xman_common::{
    name::DomainRef,
    protocol::{Create, Define, MAX_XML, Request, Verb},
};

use crate::{
    change::{change, may},
    exit::Tally,
    setting::{Setting, Stop},
    target::Target,
    told::Told,
};

/// What `rxm help create` says after the options.
pub(crate) const CREATE_HELP: &str = "\
Without --define the domain is gone when it ends.

Examples:
  rxm -H skirit80 create web.xml
  rxm -H skirit80 create --define web.xml
  virsh dumpxml web | rxm -H skirit80 create --paused -";

/// What `rxm help define` says after the options.
pub(crate) const DEFINE_HELP: &str = "\
Examples:
  rxm -H skirit80 define web.xml
  rxm -H skirit80 define - < web.xml";

/// Arguments of `create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The XML; - means standard input
    pub(crate) file: PathBuf,
    /// Keep the definition when the domain ends
    #[arg(long)]
    pub(crate) define: bool,
    /// Leave the virtual CPUs stopped
    #[arg(long)]
    pub(crate) paused: bool,
}

/// Arguments of `define`.
#[derive(Debug, Args)]
pub(crate) struct DefineArgs {
    /// The XML; - means standard input
    pub(crate) file: PathBuf,
}

/// `rxm create`
pub(crate) async fn create(setting: &Setting, args: CreateArgs) -> Result<Tally, Stop> {
    let address = setting.one_host("create")?;
    let xml = read(&args.file)?;
    let past = match (args.define, args.paused) {
        (false, false) => "created",
        (false, true) => "created, paused",
        (true, false) => "defined and started",
        (true, true) => "defined and started, paused",
    };
    let request = Request::Create(Create {
        xml,
        define: args.define,
        paused: args.paused,
    });
    send(setting, address, &args.file, &request, past).await
}

/// `rxm define`
pub(crate) async fn define(setting: &Setting, args: DefineArgs) -> Result<Tally, Stop> {
    let address = setting.one_host("define")?;
    let xml = read(&args.file)?;
    let request = Request::Define(Define {
        xml,
        replaces: None,
    });
    send(setting, address, &args.file, &request, "defined").await
}

async fn send(
    setting: &Setting,
    address: Address,
    file: &Path,
    request: &Request,
    past: &str,
) -> Result<Tally, Stop> {
    setting.check_ticket().await?;
    let verb = request.verb();
    let mut told = Told::new(setting, verb, false);
    let target = Target {
        address,
        domain: DomainRef::Uuid(uuid::Uuid::nil()),
        row: None,
        by: None,
    };
    if setting.dry_run {
        rehearse(setting, &mut told, &target, file, verb).await;
        return told.finish();
    }
    let mut caller = setting.caller(&target.address);
    match change(setting, &mut caller, request).await {
        Ok(reply) => told.success(&target, past, reply),
        Err(error) => told.failed_on(&target.address, error),
    }
    told.finish()
}

async fn rehearse(
    setting: &Setting,
    told: &mut Told<'_>,
    target: &Target,
    file: &Path,
    verb: Verb,
) {
    let what = format!("a domain from {} on {}", source(file), target.address);
    match may(setting, &mut setting.caller(&target.address), verb, None).await {
        Ok(allowed) => told.rehearse_line(&target.address, &what, None, allowed),
        Err(error) => told.failed_on(&target.address, error),
    }
}

fn source(file: &Path) -> String {
    if file == Path::new("-") {
        "standard input".to_owned()
    } else {
        file.display().to_string()
    }
}

/// Reads XML; `-` is standard input.
fn read(file: &Path) -> Result<String, Stop> {
    let name = source(file);
    let failed = |text: String| Stop::Failed(Kind::Refused, format!("{name}: {text}"));
    let mut bytes = Vec::new();
    let limit = MAX_XML as u64;
    let read = if file == Path::new("-") {
        io::stdin()
            .lock()
            .take(limit + 1)
            .read_to_end(&mut bytes)
            .map(|_| None)
    } else {
        fs::File::open(file).and_then(|opened| {
            let length = opened.metadata()?.len();
            opened
                .take(limit + 1)
                .read_to_end(&mut bytes)
                .map(|_| Some(length))
        })
    };
    let length = read.map_err(|error| failed(error.to_string()))?;
    if bytes.len() > MAX_XML {
        let size = match length.filter(|length| *length > limit) {
            Some(length) => format!("{length} bytes, and one call carries at most {MAX_XML}"),
            None => format!("more than the {MAX_XML} bytes that one call carries"),
        };
        return Err(failed(format!("the XML has {size}; nothing was sent")));
    }
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(failed("there is no XML in it".to_owned()));
    }
    String::from_utf8(bytes)
        .map_err(|_| failed("it is not UTF-8 text; save it as UTF-8".to_owned()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[track_caller]
    fn refused(bytes: &[u8], word: &str) {
        let file = file(bytes);
        let Err(Stop::Failed(Kind::Refused, text)) = read(file.path()) else {
            panic!("not refused")
        };
        assert!(text.contains(word), "{text}");
    }

    #[test]
    fn xml_that_cannot_be_sent_is_refused_before_it_is_sent() {
        assert_eq!(
            read(file(b"<domain/>").path()).ok().as_deref(),
            Some("<domain/>")
        );
        refused(&vec![b' '; MAX_XML + 1], &format!("{} bytes", MAX_XML + 1));
        refused(b" \n", "no XML");
        refused(b"<\xff/>", "UTF-8");
        assert!(read(Path::new("/nonexistent/x.xml")).is_err());
        assert!(read(Path::new("/")).is_err());
        assert!(matches!(
            read(Path::new("/dev/zero")),
            Err(Stop::Failed(..))
        ));
    }
}
