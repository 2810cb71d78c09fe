#!/bin/sh
# What the test guest does at boot: drivers, the config drive, its network, SSH, and one line that says so.
export PATH=/bin:/usr/sbin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /run/config
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /tmp
while read -r module; do insmod "/lib/modules/$module" 2>/dev/null; done </lib/modules/order
hostname guest
ip link set lo up
acpid -l /dev/null -p /run/acpid.pid

# An optical drive shows up a moment after its driver: wait for it, but boot without one too.
find_config_drive() {
    for device in /dev/sr[0-9]* /dev/vd[b-z]; do
        [ -b "$device" ] || continue
        # The volume label lies at offset 40 of the first volume descriptor (ECMA-119, 8.4.7).
        [ "$(dd if="$device" bs=8 skip=4101 count=1 2>/dev/null)" = config-2 ] && echo "$device" && return
    done
    return 1
}
tries=0
until drive=$(find_config_drive) || [ $tries -ge 60 ]; do
    usleep 50000
    tries=$((tries + 1))
done
config=/run/config/openstack/latest
[ -n "$drive" ] && mount -t iso9660 -o ro "$drive" /run/config

link_of() {
    for address in /sys/class/net/*/address; do
        [ "$(cat "$address")" = "$1" ] && basename "$(dirname "$address")" && return
    done
    return 1
}
# Dotted or colon-separated mask to prefix length, by its leading bits.
prefix_of() {
    case $1 in
    *:*) awk -v mask="$1" 'BEGIN { n = gsub(/[fF]/, "", mask); print n * 4 }' ;;
    *.*) ipcalc -p 0.0.0.0 "$1" | cut -d= -f2 ;;
    *) echo 64 ;;
    esac
}
for link in /sys/class/net/*; do ip link set "$(basename "$link")" up; done
[ -f $config/network_data.json ] && awk -f /lib/json.awk $config/network_data.json | awk -f /lib/network.awk |
    while read -r kind mac family network mask gateway; do
        link=$(link_of "$mac") || continue
        case $kind in
        link) [ "$family" -gt 0 ] && ip link set "$link" mtu "$family" ;;
        address)
            case $network in */*) ;; *) network=$network/$(prefix_of "$mask") ;; esac
            ip addr add "$network" dev "$link"
            ;;
        route)
            case $network in
            */*) target=$network ;;
            0.0.0.0 | ::) target=default ;;
            *) target=$network/$(prefix_of "$mask") ;;
            esac
            [ "$family" = 6 ] && ip -6 route add "$target" via "$gateway" dev "$link"
            [ "$family" = 4 ] && ip route add "$target" via "$gateway" dev "$link"
            ;;
        esac
    done

if [ -f $config/meta_data.json ]; then
    awk -f /lib/json.awk $config/meta_data.json >/run/meta_data
    name=$(sed -n 's#^/hostname\t##p' /run/meta_data | head -n 1)
    [ -n "$name" ] || name=$(sed -n 's#^/name\t##p' /run/meta_data | head -n 1)
    [ -n "$name" ] && hostname "$name"
    sed -n 's#^/public_keys/.*\t##p' /run/meta_data >/root/.ssh/authorized_keys
    chmod 600 /root/.ssh/authorized_keys
fi
dropbear -R -s -E 2>/run/dropbear.log

if [ -f $config/user_data ] && [ "$(head -c 2 $config/user_data)" = '#!' ]; then
    sh $config/user_data </dev/null >/dev/console 2>&1 &
fi

addresses=$(ip -o addr show scope global | awk '{ sub(/\/.*/, "", $4); printf "%s%s", comma, $4; comma = "," }')
echo "GODWIT-GUEST ready hostname=$(hostname) address=${addresses:-none} uptime=$(cut -d' ' -f1 /proc/uptime)" >/dev/console
