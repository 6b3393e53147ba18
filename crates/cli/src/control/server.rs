//! Answers at the socket. Whoever connects can hold up nobody but others who connect, and those for a while.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::Uid;
use serde_json::Value;

use super::{PATIENCE, Reply, Request, place, read_line};

/// Answers a request; an error is one line for people.
pub(crate) type Answer = Arc<dyn Fn(Request) -> Result<Value, String> + Send + Sync>;

/// How many are answered at a time.
const MOST: usize = 16;

/// A socket, to which others can connect.
#[derive(Debug)]
pub(crate) struct Server {
    listener: UnixListener,
    offered: Offered,
}

/// The socket's file, which is gone where this is, once those have their answers that are being answered.
#[derive(Debug)]
pub(crate) struct Offered {
    path: PathBuf,
    busy: Arc<AtomicUsize>,
}

impl Drop for Offered {
    fn drop(&mut self) {
        // Others take away what is left of processes that have ended.
        let _ = fs::remove_file(&self.path);
        let until = Instant::now() + PATIENCE;
        while self.busy.load(Ordering::SeqCst) > 0 && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Server {
    /// This process's.
    pub(crate) fn new() -> io::Result<Server> {
        let path = place::socket()?;
        // An earlier process had this number.
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        let busy = Arc::default();
        let offered = Offered { path, busy };
        fs::set_permissions(&offered.path, Permissions::from_mode(0o600))?;
        Ok(Server { listener, offered })
    }

    /// Answers from here on, in a thread that has the signals of this one.
    pub(crate) fn start(self, answer: Answer) -> io::Result<Offered> {
        let Server { listener, offered } = self;
        let busy = Arc::clone(&offered.busy);
        let serve = move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else {
                    // Out of descriptors, say.
                    thread::sleep(Duration::from_millis(100));
                    continue;
                };
                if busy.fetch_add(1, Ordering::SeqCst) >= MOST {
                    busy.fetch_sub(1, Ordering::SeqCst);
                    continue;
                }
                let (answer, of_this) = (Arc::clone(&answer), Arc::clone(&busy));
                let one = move || {
                    // Who went away gets no answer.
                    let _ = respond(stream, &answer);
                    of_this.fetch_sub(1, Ordering::SeqCst);
                };
                if thread::Builder::new().name("control".to_owned()).spawn(one).is_err() {
                    busy.fetch_sub(1, Ordering::SeqCst);
                }
            }
        };
        thread::Builder::new().name("control".to_owned()).spawn(serve)?;
        Ok(offered)
    }
}

fn respond(mut stream: UnixStream, answer: &Answer) -> io::Result<()> {
    // The directory lets no others in; it may have been made wider.
    let user = rustix::net::sockopt::socket_peercred(&stream)?.uid.as_raw();
    if user != 0 && user != Uid::effective().as_raw() {
        return Ok(());
    }
    stream.set_write_timeout(Some(PATIENCE))?;
    let line = read_line(&mut stream, Instant::now() + PATIENCE)?;
    let reply = match serde_json::from_slice(&line) {
        Ok(request) => answer(request).map_or_else(Reply::Error, Reply::Done),
        Err(_) if line.is_empty() => return Ok(()),
        Err(error) => Reply::Error(format!("the request is not understood: {error}")),
    };
    let mut bytes = serde_json::to_vec(&reply)?;
    bytes.push(b'\n');
    stream.write_all(&bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::Mutex;

    use serde_json::json;

    use super::*;

    /// What a client gets for these bytes.
    fn sent(bytes: &[u8], answer: &Answer) -> String {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let answer = Arc::clone(answer);
        let served = thread::spawn(move || drop(respond(theirs, &answer)));
        // The server may have closed it already.
        let _ = ours.write_all(bytes);
        let _ = ours.shutdown(std::net::Shutdown::Write);
        let mut text = String::new();
        let _ = ours.read_to_string(&mut text);
        served.join().unwrap();
        text
    }

    #[test]
    fn garbage_is_answered_or_dropped_and_reaches_nobody() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let seeing = Arc::clone(&seen);
        let answer: Answer = Arc::new(move |request| {
            seeing.lock().unwrap().push(request);
            Ok(json!({ "vms": 1 }))
        });
        assert_eq!(sent(b"{\"request\":\"state\"}\n", &answer), "{\"done\":{\"vms\":1}}\n");
        assert_eq!(
            sent(b"{\"request\":\"reload\",\"policy\":\"a\\nb\"}\nmore", &answer),
            "{\"done\":{\"vms\":1}}\n"
        );
        for garbage in [
            &b"\n"[..],
            b"{}\n",
            b"\xff\xfe\n",
            b"{\"request\":\"shutdown\"}\n",
            b"[[[[\n",
        ] {
            let text = sent(garbage, &answer);
            assert!(
                text.is_empty() || text.starts_with("{\"error\":\"the request is not understood"),
                "{text}"
            );
        }
        // Without an end, and one that is too long.
        assert_eq!(sent(b"{\"request\":\"state\"}", &answer), "");
        assert_eq!(sent(&vec![b'a'; 17 << 20], &answer), "");
        let policy = "a\nb".to_owned();
        assert_eq!(*seen.lock().unwrap(), [Request::State, Request::Reload { policy }]);
    }
}
