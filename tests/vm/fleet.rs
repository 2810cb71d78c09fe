//! A fleet of one host in a VM: coordinator, agent and libvirtd, without systemd.

use godwit_tests::vm::{Builder, Vm, VmError};
use serde_json::Value;

/// Where the API is without TLS, inside.
pub(crate) const API_PORT: u16 = 8780;

/// Where the agent's series are, inside.
pub(crate) const METRICS_PORT: u16 = 9177;

/// `$ADDRESS` is the VM's, `$SETTINGS` are lines of agent.toml.
const START: &str = r#"
mkdir -p /sys/fs/bpf /srv/godwit /run/godwit /var/log/libvirt /var/lib/godwit
mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
# What the package of the system's libvirtd makes, which wants systemd.
grep -q '^kvm:' /etc/group || echo 'kvm:x:994:' >> /etc/group
grep -q '^libvirt-qemu:' /etc/group || echo 'libvirt-qemu:x:64055:' >> /etc/group
echo 'libvirt-qemu:x:64055:994::/var/lib/libvirt:/usr/sbin/nologin' >> /etc/passwd
cat > /etc/libvirt/qemu.conf <<END
stdio_handler = "file"
security_driver = "none"
namespaces = []
cgroup_controllers = []
user = "root"
group = "root"
END
echo 'auth_unix_rw = "none"' > /etc/libvirt/libvirtd.conf
libvirtd > /var/log/libvirtd 2>&1 &
godwit-coordinator init --dir /etc/godwit --url https://$ADDRESS:8774 --pool /srv/godwit
sed -i '1i plain_listen = "127.0.0.1:8780"' /etc/godwit/coordinator.toml
godwit-coordinator run --dir /etc/godwit > /var/log/coordinator 2>&1 &
until bash -c "exec 3<>/dev/tcp/$ADDRESS/8774" 2> /dev/null; do sleep 0.2; done
printf 'virtualization = "tcg"\nreserved_memory_mib = 64\n%s\n' "$SETTINGS" > /var/lib/godwit/agent.toml
timeout 60 sh -c 'until virsh -q list > /dev/null 2>&1; do sleep 0.2; done'
export OS_CLIENT_CONFIG_FILE=/etc/godwit/clouds.yaml
godwit-agent join https://$ADDRESS:8774 "$(godwit host token --quiet)"
godwit-agent run > /var/log/agent 2>&1 &
timeout 120 sh -c 'until godwit --json host list | grep -q "\"cells\": *[1-9]"; do sleep 0.3; done'
"#;

/// A VM with the programs that a fleet is made of.
pub(crate) fn builder(name: &str) -> Builder {
    Vm::builder(name).program("godwit").program("godwit-agent").program("godwit-coordinator")
}

/// Starts the fleet, and waits until its host has said what it has.
#[track_caller]
pub(crate) fn start(vm: &Vm, address: &str, settings: &str) {
    let environment = [("ADDRESS", address), ("SETTINGS", settings)];
    let environment = environment.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let started = vm
        .spawn_with(&["sh", "-euc", START], &environment, "")
        .and_then(|mut starting| starting.finish(std::time::Duration::from_secs(240)));
    if let Err(error) = started {
        panic!("{error}\n{}", logs(vm));
    }
}

/// The ends of the daemons' logs.
pub(crate) fn logs(vm: &Vm) -> String {
    let logs = "for log in libvirtd agent coordinator; do echo \"--- $log\"; tail -n 30 /var/log/$log; done";
    vm.shell(logs).unwrap_or_default()
}

/// Runs `godwit --json` as the admin.
pub(crate) fn godwit(vm: &Vm, words: &str) -> Result<Value, VmError> {
    let text = vm.shell(&format!("OS_CLIENT_CONFIG_FILE=/etc/godwit/clouds.yaml godwit --json {words}"))?;
    Ok(serde_json::from_str(&text).unwrap_or_default())
}

/// How many events of a kind the fleet knows.
pub(crate) fn events(vm: &Vm, kind: &str) -> Result<usize, VmError> {
    Ok(godwit(vm, &format!("event list --kind {kind}"))?.as_array().map_or(0, Vec::len))
}

/// The agent's series.
pub(crate) fn series(vm: &Vm) -> Result<String, VmError> {
    let ask = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{METRICS_PORT}; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    );
    vm.exec(&["bash", "-c", &ask])
}

/// The value of a series of the agent whose line begins so, its labels included.
pub(crate) fn value(vm: &Vm, name: &str) -> Result<Option<f64>, VmError> {
    let text = series(vm)?;
    let line =
        text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
    Ok(line.and_then(|line| line.rsplit(' ').next()?.parse().ok()))
}
