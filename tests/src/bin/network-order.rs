//! Carries out one order for a network with the agent's own code, on kernels that the agent's tests do not run on.
//!
//!     network-order LINK ADDRESS NAME=LINK < wanted.json
//!     network-order remove LINK ADDRESS NUMBER
//!
//! LINK and ADDRESS are those of the underlay, NAME=LINK a physical network; the order is a `NetworkWanted`.

use std::io::Read;
use std::process::ExitCode;

use godwit_agent::network::HostNetwork;
use godwit_agent::network::netlink::{Netlink, UnderlayChoice};

const USAGE: &str =
    "usage: network-order LINK ADDRESS NAME=LINK < wanted.json | network-order remove LINK ADDRESS NUMBER";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let said = match arguments[..] {
        ["remove", link, address, number] => remove(link, address, number),
        [link, address, physical] => ensure(link, address, physical),
        _ => Err(USAGE.to_owned()),
    };
    match said {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn open(link: &str, address: &str) -> Result<Netlink, String> {
    let address = address.parse().map_err(|_| format!("{address} is no address"))?;
    let choice =
        UnderlayChoice { link: Some(link.to_owned()), address: Some(address), ..UnderlayChoice::default() };
    Netlink::open(&choice).map_err(|error| error.to_string())
}

fn ensure(link: &str, address: &str, physical: &str) -> Result<String, String> {
    let (name, carrier) = physical.split_once('=').ok_or(USAGE)?;
    let network = open(link, address)?.with_physical([(name.to_owned(), carrier.to_owned())].into());
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(|error| format!("cannot read the order: {error}"))?;
    let wanted = serde_json::from_str(&text).map_err(|error| format!("the order does not read: {error}"))?;
    let changes = network.ensure(&wanted).map_err(|error| error.to_string())?;
    Ok(if changes.is_empty() { "as wanted".to_owned() } else { format!("{changes:?}") })
}

fn remove(link: &str, address: &str, number: &str) -> Result<String, String> {
    let number = number.parse().map_err(|_| USAGE)?;
    let there = open(link, address)?.remove(number).map_err(|error| error.to_string())?;
    Ok(if there { "removed" } else { "not there" }.to_owned())
}
