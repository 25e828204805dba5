#!/usr/bin/perl
# The deployed one-shot client in small: it says that it is "2.00", sends a ping before each call on a
# connection of its own, encodes its request's text as UTF-8 twice, and decodes the reply twice.
#
#   old_client.pl SOCKET MODULE FUNCTION < a JSON array of texts > what came back for each, as JSON
use strict;
use warnings;
use Encode qw(encode decode);
use IO::Socket::UNIX;
use JSON::PP;

my ($path, $module, $function) = @ARGV;

sub exchange {
    my ($request) = @_;
    my $socket = IO::Socket::UNIX->new(Type => SOCK_STREAM, Peer => $path) or die "$path: $!";
    my $text = JSON::PP->new->canonical->encode($request);    # characters
    print {$socket} encode('UTF-8', encode('UTF-8', $text));
    $socket->shutdown(1);
    my $reply = do { local $/; <$socket> };
    $reply = decode('UTF-8', decode('UTF-8', $reply));
    return JSON::PP->new->decode($reply);
}

sub call {
    my ($params) = @_;
    my $ping = exchange({ module => 'test', function => 'ping', client_version => '2.00' });
    die 'no pong' if $ping->{result}{message} ne 'pong';
    my $reply = exchange({
        module => $module, function => $function, params => $params, client_version => '2.00',
    });
    die $reply->{error} if !$reply->{success};
    return $reply->{result};
}

my $texts = JSON::PP->new->utf8->decode(do { local $/; <STDIN> });
my @came_back;
for my $text (@$texts) {
    my $result = call({ text => $text });
    push @came_back, { text => $result->{text}, length => length $result->{text} };
}
print JSON::PP->new->utf8->canonical->encode(\@came_back);
