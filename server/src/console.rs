//! The consoles that people look at: one stream of libvirt's for each, shared by all who look, and one keyboard.
//!
//! ```text
//! guest --> screen --> a bounded queue for each viewer --> its session      what does not fit is dropped, and said in its place
//! guest <-- keys <-- the viewer who has the keyboard                        what others type goes nowhere
//!
//! first viewer: opening --> open --last one leaves--> closed
//!                  |         '------guest ends, libvirt is lost, another program takes it--> over: everybody hears why
//!                  '--refused--> over
//! ```
//! A [`Room`] decides and does no more than that; it is what the lock is held for. Whoever comes takes a [`Seat`], and leaves it when the
//! seat is dropped, however the call ends.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    future::pending,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};
use uuid::Uuid;
use xman_common::{
    name::{DomainRef, Principal},
    protocol::{Code, Console, ConsoleNews, Fault, Item, Reply, Verb},
};

use crate::{
    Host,
    caller::{Outcome, Piece},
    hypervisor::{OpenConsole, Target},
    input::Input,
    work::Work,
};

/// Who looks at one console at a time; more are answered `Busy`. Everybody is told of everybody who comes.
const MAX_VIEWERS: usize = 16;
/// Of one person: nobody keeps the others out.
const MAX_A_PERSON: usize = 4;
/// Bytes of output that wait for one viewer: a guest that writes without end must not fill this machine's memory. What is more is dropped, and
/// the viewer is told how much.
const MAX_WAITING: usize = 256 * 1024;
/// Bytes of output in one item.
const BYTES_AN_ITEM: usize = 32 * 1024;
/// News that wait for one viewer; who lets more wait does not read, and has to leave.
const MAX_NEWS: usize = 64;
/// Bytes that are typed at a time: so much at most still reaches the guest after the keyboard was taken away.
const KEYS: usize = 4096;

/// A domain's console: the hypervisor's index and the domain.
type Key = (usize, Uuid);

/// All consoles that somebody looks at.
#[derive(Default)]
pub(crate) struct Consoles {
    lines: Mutex<HashMap<Key, Arc<Line>>>,
}

/// One console.
struct Line {
    key: Key,
    room: Mutex<Room>,
}

impl Line {
    fn room(&self) -> MutexGuard<'_, Room> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks at a console until one side has enough.
pub(crate) async fn attend(asked: &Console, work: Work) -> Outcome {
    let target = work.target(Verb::Console)?;
    let seat = take_seat(&target, asked.force, &work).await?;
    let Work { outbox, input, .. } = work;
    tokio::select! {
        outcome = read(&seat, &outbox) => outcome,
        never = write(&seat, input) => match never {},
    }
}

/// Sits down where somebody looks already, or opens the console.
async fn take_seat(target: &Target, force: bool, work: &Work) -> Result<Seat, Fault> {
    loop {
        still_may(target, work)?;
        let principal = work.caller.person.principal.clone();
        let (seat, is_first) = Consoles::join(&work.host, target, principal, force)?;
        if is_first {
            let opening = open(
                Arc::clone(&work.host),
                Arc::clone(&seat.line),
                target.clone(),
                force,
                work.deadline,
            );
            // Others may wait for it when the first has gone.
            tokio::spawn(opening);
        }
        match seat.opened().await {
            // Whether the first may, and what it asked for, says nothing of the others.
            Err(_) if !is_first => {}
            Err(fault) => return Err(fault),
            Ok(()) => return Ok(seat),
        }
    }
}

/// Asks again where the domain is no longer what was judged.
fn still_may(target: &Target, work: &Work) -> Result<(), Fault> {
    let judged = &target.facts;
    let now = work
        .host
        .hypervisors
        .find(&DomainRef::Uuid(judged.uuid), Some(&judged.uri));
    match now {
        Some(now) if now.revision != judged.revision => (target.judge)(&now),
        Some(_) | None => Ok(()),
    }
}

async fn open(host: Arc<Host>, line: Arc<Line>, target: Target, force: bool, deadline: Instant) {
    let screen = {
        let line = Arc::downgrade(&line);
        Arc::new(move |bytes: &[u8]| {
            if let Some(line) = line.upgrade() {
                line.room().wrote(bytes);
            }
        })
    };
    let opened = host
        .hypervisors
        .open_console(target, force, screen, deadline)
        .await;
    let outcome = match opened {
        Err(fault) => Err(fault),
        Ok(OpenConsole { keys, ended }) => {
            line.room().open(keys);
            let defect = |_| {
                Err(Fault::new(
                    Code::Internal,
                    "a defect of xmand ended the console",
                ))
            };
            ended.await.unwrap_or_else(defect)
        }
    };
    host.consoles.end(&line, outcome);
}

/// Passes on what comes, and returns once it is over.
async fn read(seat: &Seat, outbox: &mpsc::Sender<Piece>) -> Outcome {
    loop {
        let next = seat.line.room().next(seat.viewer);
        match next {
            Next::Show(shown) => outbox
                .send(Piece::Items(vec![shown.into()]))
                .await
                .map_err(|_| Fault::new(Code::Unavailable, "the caller is gone"))?,
            Next::Wait => seat.bell.notified().await,
            Next::Over(outcome) => return outcome.map(|()| Reply::Done),
        }
    }
}

/// Types as fast as the guest takes it, and takes for nothing what comes from whoever reads along.
async fn write(seat: &Seat, mut input: Input) -> Infallible {
    while let Some(bytes) = input.next().await {
        for keys in bytes.chunks(KEYS) {
            let Some(guest) = seat.line.room().keyboard(seat.viewer) else {
                break;
            };
            // By the time there is room, somebody may have taken the keyboard over.
            if let Ok(place) = guest.reserve().await
                && seat.line.room().keyboard(seat.viewer).is_some()
            {
                place.send(keys.to_vec());
            }
        }
    }
    pending().await
}

impl Consoles {
    /// Takes a seat; says whether it is the first one, so that the console has to be opened.
    fn join(
        host: &Arc<Host>,
        target: &Target,
        principal: Principal,
        force: bool,
    ) -> Result<(Seat, bool), Fault> {
        let key = (target.facts.hypervisor, target.facts.uuid);
        let mut lines = host.consoles.lines();
        let line = Arc::clone(lines.entry(key).or_insert_with(|| {
            Arc::new(Line {
                key,
                room: Mutex::default(),
            })
        }));
        let mut room = line.room();
        let is_first = room.is_empty();
        let bell = Arc::<Notify>::default();
        let viewer = room.join(principal, force, Arc::clone(&bell))?;
        drop(room);
        let seat = Seat {
            host: Arc::clone(host),
            line,
            viewer,
            bell,
        };
        Ok((seat, is_first))
    }

    /// Tells everybody that a console is over; whoever comes now opens it anew.
    fn end(&self, line: &Arc<Line>, outcome: Result<(), Fault>) {
        let mut lines = self.lines();
        if lines
            .get(&line.key)
            .is_some_and(|now| Arc::ptr_eq(now, line))
        {
            lines.remove(&line.key);
        }
        line.room().end(outcome);
    }

    fn leave(&self, line: &Arc<Line>, viewer: u64) {
        let mut lines = self.lines();
        let mut room = line.room();
        room.leave(viewer);
        if room.is_empty()
            && lines
                .get(&line.key)
                .is_some_and(|now| Arc::ptr_eq(now, line))
        {
            lines.remove(&line.key);
        }
    }

    fn lines(&self) -> MutexGuard<'_, HashMap<Key, Arc<Line>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody's place before a console, until it is dropped.
struct Seat {
    host: Arc<Host>,
    line: Arc<Line>,
    viewer: u64,
    bell: Arc<Notify>,
}

impl Seat {
    /// Waits until the console is open.
    async fn opened(&self) -> Result<(), Fault> {
        loop {
            let state = match &self.line.room().state {
                State::Opening => None,
                State::Open(_) => Some(Ok(())),
                State::Over(Ok(())) => Some(Err(Fault::new(Code::Conflict, "the guest has ended"))),
                State::Over(Err(fault)) => Some(Err(fault.clone())),
            };
            match state {
                Some(state) => return state,
                None => self.bell.notified().await,
            }
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.host.consoles.leave(&self.line, self.viewer);
    }
}

/// Who is before a console, who types, and what each has still to be shown.
#[derive(Default)]
struct Room {
    state: State,
    /// Who has the keyboard, and then who waits for it, longest first.
    viewers: VecDeque<Viewer>,
    next: u64,
}

#[derive(Default)]
enum State {
    #[default]
    Opening,
    /// With the way to the guest.
    Open(mpsc::Sender<Vec<u8>>),
    Over(Result<(), Fault>),
}

struct Viewer {
    number: u64,
    principal: Principal,
    waiting: Waiting,
    bell: Arc<Notify>,
}

impl Viewer {
    fn tell(&mut self, news: ConsoleNews) {
        self.waiting.news(news);
        self.bell.notify_one();
    }
}

/// What a viewer is shown.
#[derive(Debug, PartialEq)]
enum Shown {
    Bytes(Vec<u8>),
    News(ConsoleNews),
    Lost(u64),
}

impl From<Shown> for Item {
    fn from(shown: Shown) -> Self {
        match shown {
            Shown::Bytes(bytes) => Self::Bytes(bytes),
            Shown::News(news) => Self::Console(news),
            Shown::Lost(bytes) => Self::Console(ConsoleNews::Lost(bytes)),
        }
    }
}

/// What a viewer does next.
#[derive(Debug, PartialEq)]
enum Next {
    Show(Shown),
    Wait,
    Over(Result<(), Fault>),
}

impl Room {
    fn is_empty(&self) -> bool {
        self.viewers.is_empty()
    }

    /// Adds a viewer: the first one types, and so does one who takes the keyboard over.
    fn join(&mut self, principal: Principal, force: bool, bell: Arc<Notify>) -> Result<u64, Fault> {
        if self.viewers.len() >= MAX_VIEWERS {
            return Err(Fault::new(
                Code::Busy,
                format!(
                    "{MAX_VIEWERS} people look at this console already; come back when one has left"
                ),
            ));
        }
        let theirs = self
            .viewers
            .iter()
            .filter(|viewer| viewer.principal == principal)
            .count();
        if theirs >= MAX_A_PERSON {
            return Err(Fault::new(
                Code::Busy,
                format!("you look at this console {MAX_A_PERSON} times already; leave one of them"),
            ));
        }
        self.next += 1;
        let number = self.next;
        let viewer = Viewer {
            number,
            principal: principal.clone(),
            waiting: Waiting::default(),
            bell,
        };
        let takes_over = force && !self.viewers.is_empty();
        if takes_over {
            // Who had the keyboard has waited least.
            if let Some(before) = self.viewers.pop_front() {
                self.viewers.push_back(before);
            }
            self.viewers.push_front(viewer);
        } else {
            self.viewers.push_back(viewer);
        }
        if !matches!(self.state, State::Open(_)) {
            return Ok(number);
        }
        for other in self.others(number) {
            other.tell(ConsoleNews::Joined(principal.clone()));
            if takes_over {
                other.tell(ConsoleNews::Keyboard {
                    principal: principal.clone(),
                    is_mine: false,
                });
            }
        }
        self.welcome(number);
        Ok(number)
    }

    fn others(&mut self, number: u64) -> impl Iterator<Item = &mut Viewer> {
        self.viewers
            .iter_mut()
            .filter(move |viewer| viewer.number != number)
    }

    /// Tells a viewer who is here.
    fn welcome(&mut self, number: u64) {
        let Some(holder) = self.viewers.front() else {
            return;
        };
        let (keyboard, is_mine) = (holder.principal.clone(), holder.number == number);
        let others = self
            .viewers
            .iter()
            .skip(1)
            .filter(|viewer| viewer.number != number)
            .map(|viewer| viewer.principal.clone())
            .collect();
        if let Some(viewer) = self
            .viewers
            .iter_mut()
            .find(|viewer| viewer.number == number)
        {
            viewer.tell(ConsoleNews::Attached {
                keyboard,
                is_mine,
                others,
            });
        }
    }

    /// The console is open; if nobody is there any more, it is closed again.
    fn open(&mut self, keys: mpsc::Sender<Vec<u8>>) {
        if self.viewers.is_empty() || matches!(self.state, State::Over(_)) {
            return;
        }
        self.state = State::Open(keys);
        let numbers: Vec<_> = self.viewers.iter().map(|viewer| viewer.number).collect();
        numbers.into_iter().for_each(|number| self.welcome(number));
    }

    /// The console is over; the first reason counts.
    fn end(&mut self, outcome: Result<(), Fault>) {
        if !matches!(self.state, State::Over(_)) {
            self.state = State::Over(outcome);
        }
        self.viewers
            .iter()
            .for_each(|viewer| viewer.bell.notify_one());
    }

    /// Takes a viewer out. The keyboard goes to who has waited longest; with the last one the console is closed.
    fn leave(&mut self, number: u64) {
        let Some(at) = self
            .viewers
            .iter()
            .position(|viewer| viewer.number == number)
        else {
            return;
        };
        let Some(gone) = self.viewers.remove(at) else {
            return;
        };
        let Some(holder) = self.viewers.front() else {
            self.end(Ok(()));
            return;
        };
        if !matches!(self.state, State::Open(_)) {
            return;
        }
        let (holder, principal) = (holder.number, holder.principal.clone());
        for viewer in &mut self.viewers {
            viewer.tell(ConsoleNews::Left(gone.principal.clone()));
            if at == 0 {
                viewer.tell(ConsoleNews::Keyboard {
                    principal: principal.clone(),
                    is_mine: viewer.number == holder,
                });
            }
        }
    }

    /// Shows everybody what the guest wrote.
    fn wrote(&mut self, bytes: &[u8]) {
        for viewer in &mut self.viewers {
            viewer.waiting.output(bytes);
            viewer.bell.notify_one();
        }
    }

    /// Returns the way to the guest, for who has the keyboard.
    fn keyboard(&self, number: u64) -> Option<mpsc::Sender<Vec<u8>>> {
        let State::Open(keys) = &self.state else {
            return None;
        };
        let holder = self.viewers.front()?;
        (holder.number == number).then(|| keys.clone())
    }

    /// Returns what a viewer is to be shown next; the end comes after all else.
    fn next(&mut self, number: u64) -> Next {
        let viewer = self
            .viewers
            .iter_mut()
            .find(|viewer| viewer.number == number);
        let Some(viewer) = viewer else {
            return Next::Over(Ok(()));
        };
        if viewer.waiting.is_stuck() {
            return Next::Over(Err(Fault::new(
                Code::Refused,
                "you do not read what comes; come back when you can",
            )));
        }
        match (viewer.waiting.take(), &self.state) {
            (Some(shown), _) => Next::Show(shown),
            (None, State::Over(outcome)) => Next::Over(outcome.clone()),
            (None, State::Opening | State::Open(_)) => Next::Wait,
        }
    }
}

/// What one viewer has still to be shown, in its order, and never more than there is room for.
#[derive(Default)]
struct Waiting {
    items: VecDeque<Shown>,
    bytes: usize,
    news: usize,
}

impl Waiting {
    fn output(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(BYTES_AN_ITEM) {
            self.piece(piece);
        }
    }

    /// Drops what does not fit, whole pieces rather than parts.
    fn piece(&mut self, piece: &[u8]) {
        if self.bytes + piece.len() > MAX_WAITING {
            let dropped = u64::try_from(piece.len()).unwrap_or(u64::MAX);
            match self.items.back_mut() {
                Some(Shown::Lost(lost)) => *lost = lost.saturating_add(dropped),
                Some(Shown::Bytes(_) | Shown::News(_)) | None => {
                    self.items.push_back(Shown::Lost(dropped));
                }
            }
            return;
        }
        self.bytes += piece.len();
        match self.items.back_mut() {
            Some(Shown::Bytes(last)) if last.len() + piece.len() <= BYTES_AN_ITEM => {
                last.extend_from_slice(piece);
            }
            Some(_) | None => self.items.push_back(Shown::Bytes(piece.to_vec())),
        }
    }

    fn news(&mut self, news: ConsoleNews) {
        self.news += 1;
        if !self.is_stuck() {
            self.items.push_back(Shown::News(news));
        }
    }

    fn is_stuck(&self) -> bool {
        self.news > MAX_NEWS
    }

    fn take(&mut self) -> Option<Shown> {
        let shown = self.items.pop_front()?;
        match &shown {
            Shown::Bytes(bytes) => self.bytes = self.bytes.saturating_sub(bytes.len()),
            Shown::News(_) => self.news = self.news.saturating_sub(1),
            Shown::Lost(_) => {}
        }
        Some(shown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> Principal {
        format!("{name}@XMAN.TEST").parse().unwrap()
    }

    /// A room, and the guest's end of its keyboard.
    fn room() -> (Room, mpsc::Receiver<Vec<u8>>) {
        let (keys, guest) = mpsc::channel(1);
        let mut room = Room::default();
        room.join(name("alice"), false, Arc::default()).unwrap();
        room.open(keys);
        (room, guest)
    }

    fn join(room: &mut Room, who: &str, force: bool) -> u64 {
        room.join(name(who), force, Arc::default()).unwrap()
    }

    /// All that a viewer is shown now, in words.
    fn shown(room: &mut Room, number: u64) -> Vec<String> {
        let mut shown = Vec::new();
        while let Next::Show(next) = room.next(number) {
            let who = |principal: &Principal| principal.as_str().replace("@XMAN.TEST", "");
            let news = match next {
                Shown::Bytes(bytes) => {
                    shown.push(String::from_utf8(bytes).unwrap());
                    continue;
                }
                Shown::Lost(bytes) => ConsoleNews::Lost(bytes),
                Shown::News(news) => news,
            };
            shown.push(match news {
                ConsoleNews::Attached {
                    keyboard,
                    is_mine,
                    others,
                } => {
                    let others: Vec<_> = others.iter().map(who).collect();
                    format!("attached {} {is_mine} {}", who(&keyboard), others.join(","))
                }
                ConsoleNews::Joined(principal) => format!("joined {}", who(&principal)),
                ConsoleNews::Left(principal) => format!("left {}", who(&principal)),
                ConsoleNews::Keyboard { principal, is_mine } => {
                    format!("keyboard {} {is_mine}", who(&principal))
                }
                ConsoleNews::Lost(bytes) => format!("lost {bytes}"),
            });
        }
        shown
    }

    #[test]
    fn the_first_types_and_others_read_along() {
        let (mut room, _guest) = room();
        assert_eq!(shown(&mut room, 1), ["attached alice true "]);
        let bob = join(&mut room, "bob", false);
        let carol = join(&mut room, "carol", false);
        room.wrote(b"hello");
        assert_eq!(shown(&mut room, 1), ["joined bob", "joined carol", "hello"]);
        assert_eq!(
            shown(&mut room, bob),
            ["attached alice false ", "joined carol", "hello"]
        );
        assert_eq!(
            shown(&mut room, carol),
            ["attached alice false bob", "hello"]
        );
        assert!(room.keyboard(1).is_some());
        assert!(room.keyboard(bob).is_none() && room.keyboard(carol).is_none());
    }

    #[test]
    fn the_keyboard_goes_by_force_or_to_who_has_waited_longest_and_all_are_told() {
        let (mut room, _guest) = room();
        let bob = join(&mut room, "bob", false);
        let carol = join(&mut room, "carol", true);
        assert!(room.keyboard(carol).is_some() && room.keyboard(1).is_none());
        assert_eq!(
            shown(&mut room, 1),
            [
                "attached alice true ",
                "joined bob",
                "joined carol",
                "keyboard carol false"
            ]
        );
        assert_eq!(shown(&mut room, carol), ["attached carol true bob,alice"]);
        shown(&mut room, bob);
        room.leave(carol);
        assert_eq!(
            shown(&mut room, bob),
            ["left carol", "keyboard bob true"],
            "alice has waited since carol came only"
        );
        assert_eq!(shown(&mut room, 1), ["left carol", "keyboard bob false"]);
        room.leave(1);
        assert_eq!(shown(&mut room, bob), ["left alice"]);
        assert!(room.keyboard(bob).is_some());
    }

    #[test]
    fn with_the_last_one_it_is_closed() {
        let (mut room, mut guest) = room();
        room.leave(1);
        assert!(room.is_empty() && matches!(room.state, State::Over(Ok(()))));
        assert_eq!(
            guest.try_recv(),
            Err(mpsc::error::TryRecvError::Disconnected)
        );
        // Who left while it was being opened needs it no more.
        let (keys, mut guest) = mpsc::channel(1);
        let mut room = Room::default();
        let alone = join(&mut room, "alice", false);
        room.leave(alone);
        room.open(keys);
        assert_eq!(
            guest.try_recv(),
            Err(mpsc::error::TryRecvError::Disconnected)
        );
    }

    #[test]
    fn who_comes_while_it_opens_is_told_when_it_is_open() {
        let mut room = Room::default();
        let alice = join(&mut room, "alice", false);
        let bob = join(&mut room, "bob", true);
        assert_eq!(room.next(alice), Next::Wait);
        let (keys, _guest) = mpsc::channel(1);
        room.open(keys);
        assert_eq!(shown(&mut room, alice), ["attached bob false "]);
        assert_eq!(shown(&mut room, bob), ["attached bob true alice"]);
    }

    #[test]
    fn the_end_comes_after_all_output_and_the_first_reason_counts() {
        let (mut room, _guest) = room();
        shown(&mut room, 1);
        room.wrote(b"last words");
        room.end(Err(Fault::new(Code::Conflict, "taken")));
        room.end(Ok(()));
        assert_eq!(shown(&mut room, 1), ["last words"]);
        assert!(matches!(room.next(1), Next::Over(Err(fault)) if fault.code == Code::Conflict));
        assert!(room.keyboard(1).is_none());
    }

    #[test]
    fn a_flood_costs_who_does_not_read_bytes_and_this_machine_nothing() {
        let (mut room, _guest) = room();
        let reader = join(&mut room, "bob", false);
        shown(&mut room, reader);
        let line = [b'x'; 80];
        for _ in 0..100_000 {
            room.wrote(&line);
            while let Next::Show(next) = room.next(reader) {
                assert_eq!(
                    next,
                    Shown::Bytes(line.to_vec()),
                    "who reads misses nothing"
                );
            }
        }
        let waiting = &room.viewers[0].waiting;
        assert!(waiting.bytes <= MAX_WAITING && waiting.items.len() < 20);
        let held = waiting.bytes as u64;
        join(&mut room, "carol", false);
        room.wrote(&line);
        let seen = shown(&mut room, 1);
        let lost = format!("lost {}", 100_000 * 80 - held);
        assert!(seen.contains(&lost), "{}", seen.last().unwrap());
        assert_eq!(seen[seen.len() - 2..], ["joined carol", "lost 80"]);
        room.wrote(b"again");
        assert_eq!(shown(&mut room, 1), ["again"]);
    }

    #[test]
    fn who_reads_nothing_at_all_has_to_leave() {
        let (mut room, _guest) = room();
        for _ in 0..MAX_NEWS {
            let restless = join(&mut room, "bob", false);
            room.leave(restless);
        }
        assert!(room.viewers[0].waiting.items.len() <= MAX_NEWS);
        assert!(matches!(room.next(1), Next::Over(Err(fault)) if fault.code == Code::Refused));
    }

    #[test]
    fn nobody_takes_all_the_places_at_a_console() {
        let (mut room, _guest) = room();
        for _ in 0..MAX_A_PERSON {
            join(&mut room, "bob", false);
        }
        let refused = room.join(name("bob"), true, Arc::default()).unwrap_err();
        assert_eq!(refused.code, Code::Busy);
        join(&mut room, "carol", false);
    }

    #[test]
    fn only_so_many_look_at_one_console() {
        let (mut room, _guest) = room();
        for number in 1..MAX_VIEWERS {
            join(&mut room, &format!("bob{}", number / MAX_A_PERSON), false);
        }
        let refused = room.join(name("carol"), true, Arc::default()).unwrap_err();
        assert_eq!(refused.code, Code::Busy);
        assert!(room.keyboard(1).is_some());
    }
}
