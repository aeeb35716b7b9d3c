//! The connections: how many there are, how long each may take to become one, and who makes room for whom.
//!
//! A connection is a stranger's until a call with a valid key has come over it and been let in; then it is kept, where its tenant leaves as
//! many to others as it has kept itself (`places.rs`). Where there are as many as may be, in all or from one address, one makes room for the
//! new one: of those that are not kept and do nothing the oldest of the address that has most of them, so that who floods goes first; else
//! the one that has been idle for longest; else one that a tenant has beyond its share. So connections which do nothing lock nobody
//! out, nor does one tenant with calls that last.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Sleep;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::codegen::http;
use tonic::transport::server::Connected;

use super::auth::Caller;
use super::places::{Place, Places};
use super::tls::Certificate;
use crate::config::Limits;
use crate::sync::lock;

/// Bytes of the HTTP/2 client preface.
const PREFACE_BYTES: usize = 24;
/// Shortest and longest pause where the system has no file or memory for another connection.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// Connections that wait for the server to take them.
const QUEUE: usize = 16;
/// A connection that is kept makes room no sooner after its last call.
const IDLE: Duration = Duration::from_secs(5);
/// A write of more bytes than this is part of an answer; keep-alive is less.
const KEEP_ALIVE_BYTES: usize = 256;
/// The bits of an IPv6 address that tell networks apart: one host may have all addresses of a /64.
const NETWORK: u128 = u128::MAX << 64;

/// All open connections.
#[derive(Debug)]
struct Table {
    most: u64,
    most_per_address: u64,
    /// How long a connection that is kept must have been idle to make room.
    idle: Duration,
    /// For the connections that are kept for tenants.
    kept: Places,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    /// By age.
    connections: BTreeMap<u64, Entry>,
    /// By [`counted_as`].
    addresses: HashMap<IpAddr, u64>,
}

#[derive(Debug)]
struct Entry {
    peer: Peer,
    closing: CancellationToken,
}

/// The other end of a connection, and what has come over it; the edge says so. Clones share it.
#[derive(Debug, Clone)]
pub struct Peer {
    /// As [`counted_as`] gives it.
    address: IpAddr,
    kept: Places,
    calls: Arc<Mutex<PeerCalls>>,
}

/// What a connection is worth when another needs room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// No call with a valid key is in progress, and it is not kept.
    Stranger,
    /// Not kept, since its tenant has its share; a call is in progress.
    Excess,
    /// Kept, without a call since then.
    Idle(Instant),
    /// Kept, with a call in progress.
    Busy,
}

/// The calls with a valid key over one connection.
#[derive(Debug, Default)]
struct PeerCalls {
    in_progress: u64,
    /// When the last of them ended; `None` while none has.
    ended: Option<Instant>,
    /// Taken by the first call whose tenant leaves room to others, and kept as long as the connection.
    place: Option<Place>,
}

impl Peer {
    /// A call with a valid key has been let in. It is in progress until what is returned is dropped.
    pub fn begin(&self, caller: &Caller) -> Busy {
        let mut calls = lock(&self.calls);
        calls.in_progress += 1;
        if calls.place.is_none() {
            calls.place = self.kept.take(caller).ok();
        }
        Busy(self.calls.clone())
    }

    fn standing(&self) -> Standing {
        let calls = lock(&self.calls);
        match (&calls.place, calls.in_progress) {
            (None, 0) => Standing::Stranger,
            (None, _) => Standing::Excess,
            (Some(_), 0) => Standing::Idle(calls.ended.unwrap_or_else(Instant::now)),
            (Some(_), _) => Standing::Busy,
        }
    }

    /// Bytes of an answer have been sent; the end of a long one is on its way after its call.
    fn sent(&self) {
        if let Some(ended) = &mut lock(&self.calls).ended {
            *ended = Instant::now();
        }
    }
}

/// The address that a call's connection is counted under; the unspecified one where it came over none.
pub fn address_of(call: &http::Extensions) -> IpAddr {
    call.get::<Peer>().map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.address)
}

/// A call in progress keeps its connection from making room.
#[derive(Debug)]
#[must_use = "the call is over once this is dropped"]
pub struct Busy(Arc<Mutex<PeerCalls>>);

impl Drop for Busy {
    fn drop(&mut self) {
        let mut calls = lock(&self.0);
        calls.in_progress -= 1;
        calls.ended = Some(Instant::now());
    }
}

impl Open {
    fn remove(&mut self, id: u64) -> Option<Entry> {
        let entry = self.connections.remove(&id)?;
        let address = entry.peer.address;
        if let Some(count) = self.addresses.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.addresses.remove(&address);
            }
        }
        Some(entry)
    }

    /// Closes one of the connections that `among` names, in the order of the module's description; one that is kept must have been idle for
    /// `idle`. False where there is none.
    fn make_room(&mut self, idle: Duration, among: impl Fn(&Entry) -> bool) -> bool {
        let (mut strangers, mut excess, mut longest_idle) = (Candidates::default(), Candidates::default(), None);
        for (id, entry) in self.connections.iter().filter(|(_, entry)| among(entry)) {
            match entry.peer.standing() {
                Standing::Stranger => strangers.add(*id, entry.peer.address),
                Standing::Excess => excess.add(*id, entry.peer.address),
                Standing::Idle(since) if longest_idle.is_none_or(|(earlier, _)| since < earlier) => {
                    longest_idle = Some((since, *id));
                }
                Standing::Idle(_) | Standing::Busy => {}
            }
        }
        let idle = longest_idle.filter(|(since, _)| since.elapsed() >= idle).map(|(_, id)| id);
        let Some(id) = strangers.first().or(idle).or_else(|| excess.first()) else { return false };
        if let Some(entry) = self.remove(id) {
            entry.closing.cancel();
        }
        true
    }
}

/// Connections of which the oldest of the address that has most goes first: how many each address has, and its oldest.
#[derive(Debug, Default)]
struct Candidates(HashMap<IpAddr, (u64, u64)>);

impl Candidates {
    /// Adds connections by age.
    fn add(&mut self, id: u64, address: IpAddr) {
        self.0.entry(address).or_insert((0, id)).0 += 1;
    }

    fn first(&self) -> Option<u64> {
        let most = self.0.values().max_by_key(|(count, oldest)| (*count, Reverse(*oldest)));
        most.map(|(_, oldest)| *oldest)
    }
}

impl Table {
    /// Makes a table of so many connections, of which `idle` ones make room.
    fn new(limits: &Limits, idle: Duration) -> Arc<Self> {
        let (most, most_per_address) = (limits.max_connections, limits.max_connections_per_address);
        let keep = ("max_connections", most);
        let kept = Places::new("connections", keep, keep, Duration::ZERO);
        Arc::new(Self { most, most_per_address, idle, kept, open: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        lock(&self.open)
    }

    /// Counts a new connection; `None` where there is no room for it.
    fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Guest> {
        let address = counted_as(address);
        let mut open = self.lock();
        let from_here = open.addresses.get(&address).copied().unwrap_or(0);
        if from_here >= self.most_per_address && !open.make_room(self.idle, |entry| entry.peer.address == address) {
            return None;
        }
        if open.connections.len() as u64 >= self.most && !open.make_room(self.idle, |_| true) {
            return None;
        }
        let peer = Peer { address, kept: self.kept.clone(), calls: Arc::default() };
        let (id, closing) = (open.next, CancellationToken::new());
        open.next += 1;
        *open.addresses.entry(address).or_default() += 1;
        open.connections.insert(id, Entry { peer: peer.clone(), closing: closing.clone() });
        Some(Guest { table: Arc::clone(self), id, peer, closing })
    }
}

/// The address that a client's connections are counted under: of an IPv6 address the /64, and IPv4 that came as IPv6 is IPv4.
fn counted_as(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & NETWORK).into(),
        address => address,
    }
}

/// A connection's place in the table.
#[derive(Debug)]
struct Guest {
    table: Arc<Table>,
    id: u64,
    peer: Peer,
    closing: CancellationToken,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.table.lock().remove(self.id);
    }
}

#[derive(Debug)]
enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection as the server gets it. Reading fails once it has to make room for another, or where its client does not begin to speak
/// HTTP/2 in time.
#[derive(Debug)]
pub struct Connection {
    io: Io,
    guest: Guest,
    closing: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Bytes of the preface that have not come, and the time for them.
    preface: Option<(usize, Pin<Box<Sleep>>)>,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.guest.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.closing.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buf.filled().len();
        let read = match &mut this.io {
            Io::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Io::Tls(io) => Pin::new(io.as_mut()).poll_read(cx, buf),
        };
        let Some((missing, time)) = &mut this.preface else { return read };
        *missing = missing.saturating_sub(buf.filled().len() - before);
        if *missing == 0 {
            this.preface = None;
        } else if read.is_pending() && time.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl Connection {
    fn note(&self, written: &Poll<io::Result<usize>>) {
        if matches!(written, Poll::Ready(Ok(bytes)) if *bytes > KEEP_ALIVE_BYTES) {
            self.guest.peer.sent();
        }
    }
}

/// Passes one method of [`AsyncWrite`] on.
macro_rules! written {
    ($self:ident, $method:ident, $($argument:expr),*) => {
        match &mut $self.io {
            Io::Plain(io) => Pin::new(io).$method($($argument),*),
            Io::Tls(io) => Pin::new(io.as_mut()).$method($($argument),*),
        }
    };
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = written!(self, poll_write, cx, bytes);
        self.note(&written);
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        written!(self, poll_flush, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        written!(self, poll_shutdown, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = written!(self, poll_write_vectored, cx, bytes);
        self.note(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(io) => io.is_write_vectored(),
            Io::Tls(io) => io.is_write_vectored(),
        }
    }
}

/// Takes connections until the stream is dropped, which closes the port.
pub fn accept(
    listener: TcpListener,
    tls: Option<Arc<Certificate>>,
    limits: &Limits,
) -> impl Stream<Item = Result<Connection, Infallible>> + use<> {
    let table = Table::new(limits, IDLE);
    let time = Duration::from_secs(limits.handshake_seconds);
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let mut pause = BACK_OFF.0;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            match accepted {
                Ok((io, address)) => {
                    pause = BACK_OFF.0;
                    match table.enter(address.ip()) {
                        Some(guest) => drop(tokio::spawn(begin(io, guest, tls.clone(), time, sender.clone()))),
                        None => metrics::counter!("tenora_connections_refused_total").increment(1),
                    }
                }
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "no connection can be taken for the moment");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(BACK_OFF.1);
                }
            }
        }
    });
    futures::StreamExt::map(ReceiverStream::new(receiver), Ok)
}

/// Whether an error of accepting concerns a connection that is gone, not the server.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Ends the TLS handshake, in time, and hands the connection to the server.
async fn begin(
    io: TcpStream,
    guest: Guest,
    tls: Option<Arc<Certificate>>,
    time: Duration,
    sender: mpsc::Sender<Connection>,
) {
    // A connection that is gone says so when it is read.
    let _ = io.set_nodelay(true);
    let io = match tls {
        None => Io::Plain(io),
        Some(tls) => {
            let shaken = tokio::select! {
                shaken = tokio::time::timeout(time, tls.acceptor().accept(io)) => shaken,
                () = guest.closing.cancelled() => return,
            };
            match shaken {
                Ok(Ok(io)) => Io::Tls(Box::new(io)),
                Ok(Err(error)) => return tracing::debug!(%error, "a TLS handshake failed"),
                Err(_) => return tracing::debug!("a TLS handshake took too long"),
            }
        }
    };
    let closing = Box::pin(guest.closing.clone().cancelled_owned());
    let preface = Some((PREFACE_BYTES, Box::pin(tokio::time::sleep(time))));
    // A server that is going away takes none.
    let _ = sender.send(Connection { io, guest, closing, preface }).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Tenant, TenantId};

    fn table(most: u64, most_per_address: u64, idle: Duration) -> Arc<Table> {
        let limits =
            Limits { max_connections: most, max_connections_per_address: most_per_address, ..Limits::default() };
        Table::new(&limits, idle)
    }

    /// A call of the operator begins.
    fn called(guest: &Guest) -> Busy {
        guest.peer.begin(&Caller::Operator)
    }

    fn tenant(id: &str) -> Caller {
        Caller::Tenant(Tenant::proven(TenantId::new(id).unwrap()))
    }

    #[test]
    fn who_floods_makes_room_first() {
        let table = table(4, 4, Duration::from_secs(3600));
        let early = table.enter(address(1)).unwrap();
        let flood: Vec<_> = (0..3).map(|_| table.enter(address(2)).unwrap()).collect();
        let more: Vec<_> = (0..3).map(|_| table.enter(address(2)).unwrap()).collect();
        assert!(flood.iter().all(|guest| guest.closing.is_cancelled()) && !early.closing.is_cancelled());
        drop((flood, more));
    }

    /// A tenant with calls in progress everywhere keeps half of the connections; the others make room, for whoever comes.
    #[test]
    fn one_tenant_leaves_connections_to_others_whatever_it_calls() {
        let table = table(8, 8, Duration::from_secs(3600));
        let greedy: Vec<_> = (0..8).map(|_| table.enter(address(1)).unwrap()).collect();
        let calls: Vec<_> = greedy.iter().map(|guest| guest.peer.begin(&tenant("greedy"))).collect();
        let guests: Vec<_> = (0..4)
            .map(|n| {
                let guest = table.enter(address(n)).expect("room");
                let call = if n == 0 { guest.peer.begin(&tenant("other")) } else { called(&guest) };
                (guest, call)
            })
            .collect();
        assert_eq!(greedy.iter().filter(|guest| guest.closing.is_cancelled()).count(), 4);
        assert!(guests.iter().all(|(guest, _)| guest.peer.standing() == Standing::Busy));
        drop((greedy, calls, guests));
        assert_eq!(table.kept.held(), 0);
    }

    /// What a tenant has beyond its share goes last: after those who do nothing, kept or not.
    #[test]
    fn calls_in_progress_end_only_where_nothing_else_makes_room() {
        let table = table(4, 4, Duration::ZERO);
        let greedy: Vec<_> = (0..3).map(|_| table.enter(address(1)).unwrap()).collect();
        let calls: Vec<_> = greedy.iter().map(|guest| guest.peer.begin(&tenant("greedy"))).collect();
        assert_eq!(greedy[2].peer.standing(), Standing::Excess);
        let known = table.enter(address(2)).unwrap();
        drop(called(&known));
        let stranger = table.enter(address(3)).unwrap();
        assert!(known.closing.is_cancelled() && !greedy[2].closing.is_cancelled(), "the idle one goes");
        let next = table.enter(address(4)).unwrap();
        assert!(stranger.closing.is_cancelled() && !greedy[2].closing.is_cancelled(), "the stranger goes");
        let busy = called(&next);
        let _last = table.enter(address(5)).unwrap();
        assert!(greedy[2].closing.is_cancelled());
        drop((calls, busy));
    }

    /// A flood from many addresses does not push the new clients of an address with many that are kept out.
    #[test]
    fn connections_that_are_kept_do_not_count_against_their_address() {
        let table = table(8, 8, Duration::from_secs(3600));
        let kept: Vec<_> = (0..5).map(|_| table.enter(address(1)).unwrap()).collect();
        let busy: Vec<_> = kept.iter().map(called).collect();
        let flood: Vec<_> = (0..2).map(|_| table.enter(address(2)).unwrap()).collect();
        let client = table.enter(address(1)).unwrap();
        let more = table.enter(address(2)).unwrap();
        assert!(flood[0].closing.is_cancelled() && !client.closing.is_cancelled());
        drop((busy, more));
    }

    fn address(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    #[test]
    fn the_oldest_stranger_makes_room_and_who_is_known_stays() {
        let table = table(3, 2, Duration::from_secs(3600));
        let [a, b] = [table.enter(address(1)).unwrap(), table.enter(address(1)).unwrap()];
        let c = table.enter(address(1)).unwrap();
        assert!(a.closing.is_cancelled() && !b.closing.is_cancelled(), "two from one address");
        drop(called(&b));
        drop(called(&c));
        assert!(table.enter(address(1)).is_none(), "both are known");
        let d = table.enter(address(2)).unwrap();
        let e = table.enter(address(3)).unwrap();
        assert!(d.closing.is_cancelled(), "three in all");
        drop(called(&e));
        assert!(table.enter(address(4)).is_none());
        drop(b);
        assert!(table.enter(address(4)).is_some());
        drop((a, c, d, e));
        let open = table.lock();
        assert!(open.connections.is_empty() && open.addresses.is_empty());
    }

    #[test]
    fn the_longest_idle_makes_room_where_nobody_is_a_stranger() {
        let table = table(3, 2, Duration::ZERO);
        let [a, b] = [table.enter(address(1)).unwrap(), table.enter(address(1)).unwrap()];
        let c = table.enter(address(2)).unwrap();
        let [first, second] = [called(&a), called(&a)];
        drop(called(&c));
        drop(called(&b));
        drop(first);
        let stranger = table.enter(address(3)).unwrap();
        assert!(c.closing.is_cancelled() && !b.closing.is_cancelled(), "its last call ended before the others'");
        let d = table.enter(address(1)).unwrap();
        assert!(b.closing.is_cancelled() && !stranger.closing.is_cancelled(), "two from one address");
        let answers = called(&d);
        let e = table.enter(address(4)).unwrap();
        assert!(stranger.closing.is_cancelled(), "strangers go first");
        let busy = [answers, called(&e)];
        assert!(table.enter(address(5)).is_none(), "all have calls in progress");
        assert!(!a.closing.is_cancelled());
        drop(second);
        assert!(table.enter(address(5)).is_some());
        assert!(a.closing.is_cancelled());
        drop(busy);
    }

    #[test]
    fn what_is_sent_after_a_call_counts_as_use() {
        let table = table(1, 1, Duration::ZERO);
        let guest = table.enter(address(1)).unwrap();
        let peer = &guest.peer;
        peer.sent();
        assert_eq!(peer.standing(), Standing::Stranger, "a stranger stays one");
        let busy = called(&guest);
        assert_eq!(peer.standing(), Standing::Busy);
        drop(busy);
        let Standing::Idle(ended) = peer.standing() else { panic!("{:?}", peer.standing()) };
        peer.sent();
        assert!(matches!(peer.standing(), Standing::Idle(since) if since > ended));
    }

    #[test]
    fn a_network_of_ipv6_counts_as_one_address() {
        let counted = |address: &str| counted_as(address.parse().unwrap()).to_string();
        assert_eq!(counted("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(counted("::ffff:10.0.0.1"), "10.0.0.1");
        assert_eq!(counted("10.0.0.1"), "10.0.0.1");
        let table = table(9, 1, Duration::from_secs(3600));
        let enter = |address: &str| table.enter(address.parse().unwrap());
        let first = enter("2001:db8::1").unwrap();
        let other = enter("2001:db8:0:1::1").unwrap();
        assert!(!first.closing.is_cancelled());
        let second = enter("2001:db8::2").unwrap();
        assert!(first.closing.is_cancelled() && !other.closing.is_cancelled());
        drop(second);
        assert_eq!(table.lock().addresses.len(), 1);
    }
}
